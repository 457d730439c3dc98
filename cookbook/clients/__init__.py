"""The Tinker API in process: each call is checked, queued with an engine and returned as a future."""
