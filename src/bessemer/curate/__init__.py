"""From raw text to clean documents: what is read, kept, found twice, found in an evaluation, and tokenised.

A build is five steps over units (`origins`), each a function of files that writes files:
read -> sign -> match -> join -> write (`steps`, in the order in which `build` runs them).
"""
