"""The search task of the R1-Zero demonstration: every try, who writes its pages, how a thought is judged."""
