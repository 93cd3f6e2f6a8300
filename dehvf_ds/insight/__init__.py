"""Pictures that show what a model learned."""
