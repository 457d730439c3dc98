"""The date that every chat template sees."""

import datetime

TODAY = datetime.datetime(2024, 7, 26)
"""The date that formats print: a conversation has the same tokens on any day.

It is the day that the templates of Llama 3.1 and 3.2 fall back on.
"""
