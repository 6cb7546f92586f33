"""Code judged by its tests in the sandbox: written problems, problems of a file."""
