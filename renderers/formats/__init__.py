"""One module for each family of chat formats that is spelled out in code."""
