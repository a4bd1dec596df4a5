"""Evaluation of students: against the teacher, and on benchmarks."""
