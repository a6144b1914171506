//go:build tools

// Package tools names what critest imports: critest is a test binary, and go.mod keeps the requirements of
// another module's tests only for packages that something here imports.
package tools

import (
	_ "sigs.k8s.io/cri-tools/pkg/benchmark"
	_ "sigs.k8s.io/cri-tools/pkg/common"
	_ "sigs.k8s.io/cri-tools/pkg/framework"
	_ "sigs.k8s.io/cri-tools/pkg/validate"
)
