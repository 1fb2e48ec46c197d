"""Making a value model: search where to cut, join in closed form, finetune (paper, sections 2 and 3)."""
