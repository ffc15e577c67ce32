"""Quality against sparsity: one preset trained for several λ and variants, measured, shown in one table."""
