"""What a run costs before it starts: memory, time, layout search. Every figure states its unit and its assumptions."""
