"""What a trained model's activity is like: gathered in one pass over text, summed up, drawn and reported."""
