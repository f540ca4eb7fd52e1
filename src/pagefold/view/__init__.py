"""Own how things are shown: one table of fields, and drawings. Must not know how a figure is made."""
