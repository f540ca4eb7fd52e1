"""Own real pages: of running processes and of memory images, with hashes, frames, nodes and areas.

Must not know: the engine, the plan, the command line. Nothing here ever writes to a process or stops one.
"""

from pagefold.sources.areas import Area
from pagefold.sources.image import count_image, read_image
from pagefold.sources.pages import Pages
from pagefold.sources.process import ProcessReader, list_mine

__all__ = ["Area", "Pages", "ProcessReader", "count_image", "list_mine", "read_image"]
