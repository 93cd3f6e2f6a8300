"""What a run costs before it starts: memory, arithmetic and traffic."""
