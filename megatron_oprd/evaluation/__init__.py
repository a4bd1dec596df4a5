"""Measures of a student against its teacher."""
