"""What a judge model's ratings are worth in place of people's."""
