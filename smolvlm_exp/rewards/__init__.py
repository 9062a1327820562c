"""From what is known of an image to a number for each answer: reward functions as TRL's GRPO calls them."""
