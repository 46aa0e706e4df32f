"""The command line: one module for each command, named as the command is.

It is the top layer, so it may import every other package, and no other package imports it.
Start reading at ``main.py``, which lists the commands, then at ``console.py``, which all of them share.
"""
