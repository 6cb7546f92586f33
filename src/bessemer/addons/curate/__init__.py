"""From raw text to clean, deduplicated, decontaminated shards.

A build is a sequence of steps over units (`origins`). Each step is a function that reads files and writes files:
read -> sign -> match -> join -> write (`steps`, in the order in which `build` runs them).
"""
