//go:build !requireparts

package testenv

// requireParts makes a missing real part a failure instead of a skip.
const requireParts = false
