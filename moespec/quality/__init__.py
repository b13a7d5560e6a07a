"""Quality against budget: questions with exact answers, their scorers, and what a budget costs in both."""
