"""The tables and figures of the paper's alignment (paper, sections 5 and 6), run on a small trained world."""
