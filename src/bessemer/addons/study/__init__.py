"""Studies: arms x seeds under a rule that is fixed before the first run, with controls, intervals and power."""
