"""What is measured once of a model for the expert policies that need it: `python -m moespec inspect similarity`, ..."""
