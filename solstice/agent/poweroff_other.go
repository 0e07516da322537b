//go:build !linux

package agent

import "errors"

func powerOffKernel() error { return errors.ErrUnsupported }
