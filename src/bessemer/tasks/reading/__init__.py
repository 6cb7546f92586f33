"""What a person minds in a text: its language, repetition, walls of words."""
