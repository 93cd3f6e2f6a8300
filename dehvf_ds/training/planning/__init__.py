"""What a run costs before it runs: memory, arithmetic and traffic, one function a formula (ours)."""
