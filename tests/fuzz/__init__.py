"""What the fuzzing of the objective is made of: cases with an oracle, hostile values, and a judge of what a call does."""
