"""Mutation testing of the compiler: changed model sources must be kept right or refused.

An operator (`operators/`) changes the text of one of mlx_lm's model files. The changed file is run
as it is, one sequence at a time on mlx_lm's own caches, and what the compiler makes of it is run on
paged caches and ragged batches, with the same random weights. Logits must be equal, or the compiler
must have said that it cannot. Run it with `python -m tests.mutation`; docs/mutation.md says
more.
"""
