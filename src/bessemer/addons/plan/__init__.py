"""What a run will cost: memory, time, and a search for its layout. Every figure states its unit and assumptions."""
