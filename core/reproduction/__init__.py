"""The paper's alignment tables and figures, and the matrix of every pair, run on a small trained world."""
