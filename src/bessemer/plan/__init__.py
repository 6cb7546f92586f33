"""What a run costs before it runs: counts, memory, hardware, simulation, search. No figure without unit and assumption.

Sees the model's config and counts and `parallel`'s layouts and schedule tables, nothing that trains.
"""
