"""What runs inside the sandbox: scripts that import each other by bare name and nothing of this package.

main.py is the entry point, confine.py builds namespaces if bubblewrap has not and takes rights away, serve.py runs the
program. Only the standard library is available, and every judged answer pays for each import.
"""
