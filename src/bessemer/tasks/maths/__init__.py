"""Mathematics of a file, GSM8K included, judged through math-verify in a process apart."""
