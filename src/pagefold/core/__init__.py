"""The compiled core: KSM's structures and rules over arrays.

Owns memory, trees, lists, the cursor and the rules of merging. Must not know I/O, clocks, randomness or
Python objects: everything here takes one `World` of arrays and integers and returns a status.
"""
