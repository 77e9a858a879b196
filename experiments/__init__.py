"""Everything that trains, measures or judges; see docs/architecture.md for the rooms."""
