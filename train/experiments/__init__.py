"""Questions asked of the product and not part of it: each module stands alone and can be removed."""
