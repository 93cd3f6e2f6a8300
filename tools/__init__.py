"""Tools that are run as scripts."""
