"""Word problems in parallel English and Chinese; story templates are split between training and evaluation."""
