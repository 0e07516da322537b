//go:build !linux

package testenv

func inOwnNetwork() bool { return false }
