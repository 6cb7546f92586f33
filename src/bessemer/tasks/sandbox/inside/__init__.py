"""What runs on the far side of the wall: scripts that import each other by bare name and nothing of this package.

`main.py` is the start: namespaces.py builds the walls where bubblewrap has not, first.py is process 1 behind them,
limits.py takes away rights, serve.py runs the program. Only the standard library is at hand, and each import is paid
for with every answer that is judged.
"""
