"""All of reasoning-gym by name, its scorers made strict, in a process apart."""
