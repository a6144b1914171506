// Command bench measures the latency of a container runtime's CRI calls.
//
// It runs pods of one container, one after the other, and prints the median and the 95th percentile of each call; then,
// with -keep, it leaves -pods pods running for whoever measures memory. It works against any runtime that has the image.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var (
	endpoint   = flag.String("endpoint", "", "the runtime's socket, unix://PATH")
	image      = flag.String("image", "docker.io/library/busybox:latest", "an image with sleep and true")
	iterations = flag.Int("iterations", 50, "how many pods to measure")
	atOnce     = flag.Int("at-once", 10, "how many pods to start at the same time when measuring throughput")
	pods       = flag.Int("pods", 20, "how many pods to leave running with -keep")
	keep       = flag.Bool("keep", false, "only start -pods pods and leave them running")
	parent     = flag.String("cgroup-parent", "", "the pods' cgroup parent (runtimes with the systemd driver want a slice)")
)

// namespaces are kubelet's default: each container has its own process namespace.
var namespaces = &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}

// client is a connection with the durations of the calls made over it.
type client struct {
	cri.RuntimeServiceClient
	logs string
	run  string

	mutex sync.Mutex
	order []string
	times map[string][]time.Duration
}

// timed runs one step and records how long it took under its name.
func (c *client) timed(name string, step func() error) {
	start := time.Now()
	err := step()
	took := time.Since(start)
	if err != nil {
		log.Fatalf("%s: %v", name, err)
	}
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if _, known := c.times[name]; !known {
		c.order = append(c.order, name)
	}
	c.times[name] = append(c.times[name], took)
}

// pod is a sandbox with one running container.
type pod struct {
	sandbox, container string
}

func (c *client) up(ctx context.Context, name string) pod {
	return c.upWith(ctx, name, []string{"sleep", "1000000"})
}

func (c *client) upWith(ctx context.Context, name string, command []string) pod {
	config := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: c.run + name},
		LogDirectory: c.logs,
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent:    *parent,
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: namespaces},
		},
	}
	var made pod
	c.timed("pod from nothing to running container", func() error {
		c.timed("RunPodSandbox", func() error {
			answer, err := c.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config})
			made.sandbox = answer.GetPodSandboxId()
			return err
		})
		c.timed("create + start", func() error {
			c.timed("CreateContainer", func() error {
				answer, err := c.CreateContainer(ctx, &cri.CreateContainerRequest{
					PodSandboxId:  made.sandbox,
					SandboxConfig: config,
					Config: &cri.ContainerConfig{
						Metadata: &cri.ContainerMetadata{Name: "main"},
						Image:    &cri.ImageSpec{Image: *image},
						Command:  command,
						LogPath:  name + ".log",
						Linux: &cri.LinuxContainerConfig{
							SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: namespaces},
						},
					},
				})
				made.container = answer.GetContainerId()
				return err
			})
			c.timed("StartContainer", func() error {
				_, err := c.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: made.container})
				return err
			})
			return nil
		})
		return nil
	})
	return made
}

func (c *client) use(ctx context.Context, p pod) {
	c.timed("ExecSync true", func() error {
		answer, err := c.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: p.container, Cmd: []string{"true"}, Timeout: 30})
		if err == nil && answer.GetExitCode() != 0 {
			err = fmt.Errorf("exit code %d", answer.GetExitCode())
		}
		return err
	})
	c.execs(ctx, p)
	c.timed("ContainerStatus", func() error {
		_, err := c.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: p.container})
		return err
	})
	c.timed("PodSandboxStatus", func() error {
		_, err := c.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.sandbox})
		return err
	})
	c.timed("ListContainers", func() error {
		_, err := c.ListContainers(ctx, &cri.ListContainersRequest{})
		return err
	})
	c.timed("ContainerStats", func() error {
		_, err := c.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: p.container})
		return err
	})
}

func (c *client) down(ctx context.Context, p pod) {
	c.timed("running to gone", func() error {
		// Without a grace period: sleep, as a process 1, has no handler for SIGTERM.
		c.timed("StopContainer", func() error {
			_, err := c.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: p.container})
			return err
		})
		c.timed("RemoveContainer", func() error {
			_, err := c.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: p.container})
			return err
		})
		c.timed("StopPodSandbox", func() error {
			_, err := c.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.sandbox})
			return err
		})
		c.timed("RemovePodSandbox", func() error {
			_, err := c.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.sandbox})
			return err
		})
		return nil
	})
}

// allAtOnce starts as many pods as -at-once at the same time and returns how many came up per second.
func (c *client) allAtOnce(ctx context.Context) float64 {
	made := make([]pod, *atOnce)
	start := time.Now()
	var group sync.WaitGroup
	for i := range made {
		group.Go(func() { made[i] = c.up(ctx, fmt.Sprintf("at-once-%d", i)) })
	}
	group.Wait()
	rate := float64(*atOnce) / time.Since(start).Seconds()
	for _, p := range made {
		c.down(ctx, p)
	}
	return rate
}

func (c *client) table() {
	fmt.Printf("%-40s %10s %10s %10s\n", fmt.Sprintf("%d times, one after the other", *iterations), "median ms", "p95 ms", "worst ms")
	for _, name := range c.order {
		times := c.times[name]
		slices.Sort(times)
		at := func(percent int) float64 { return times[min(len(times)*percent/100, len(times)-1)].Seconds() * 1000 }
		fmt.Printf("%-40s %10.2f %10.2f %10.2f\n", name, at(50), at(95), at(100))
	}
}

func main() {
	log.SetFlags(0)
	flag.Parse()
	connection, err := grpc.NewClient(*endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatalf("-endpoint %q: %v", *endpoint, err)
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()

	images := cri.NewImageServiceClient(connection)
	if _, err := images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: *image}}); err != nil {
		log.Fatalf("PullImage %s: %v", *image, err)
	}
	logs, err := os.MkdirTemp("", "copepod-bench")
	if err != nil {
		log.Fatal(err)
	}
	c := &client{
		RuntimeServiceClient: cri.NewRuntimeServiceClient(connection),
		logs:                 logs,
		run:                  fmt.Sprint(os.Getpid()),
		times:                map[string][]time.Duration{},
	}
	if *keep {
		// The logs of what stays are left with it.
		for i := range *pods {
			c.up(ctx, fmt.Sprintf("keep-%d", i))
		}
		return
	}
	defer os.RemoveAll(logs)

	// The first pod pays for what is cached later.
	c.down(ctx, c.up(ctx, "warm-up"))
	c.order, c.times = nil, map[string][]time.Duration{}
	for i := range *iterations {
		p := c.up(ctx, fmt.Sprintf("bench-%d", i))
		c.use(ctx, p)
		c.down(ctx, p)
	}
	c.table()
	fmt.Printf("%-40s %10.1f\n", fmt.Sprintf("pods up per second, %d at once", *atOnce), c.allAtOnce(ctx))
	fmt.Printf("%-40s %10.1f\n", "port-forward over SPDY, MiB/s each way", c.throughput(ctx))
}
