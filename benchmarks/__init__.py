"""What the README's figures come from: each benchmark prints its ratios against peers measured in the same run."""
