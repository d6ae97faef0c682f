"""The parts of `checks`: what is looked at, and how it is judged."""
