"""The tests of PEFT that do not apply to a spectral method, and why.

By suite: a pattern of test ids (as of a shell, but for brackets, which mean themselves) and the reason. A pattern that
matches nothing is an error, and so is a test that passes although it is listed.
"""

INAPPLICABLE: dict[str, dict[str, str]] = {}
