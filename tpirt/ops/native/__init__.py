"""Products and what lies between them in C: ``native.h`` has the formats.

Nothing is imported here: the build backend uses :mod:`compiling` where there is no torch.
"""
