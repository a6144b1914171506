package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/url"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// forwarded is how much one measurement of port-forward moves each way, in bytes.
const forwarded = 64 << 20

// tls is for runtimes that serve their URLs with a certificate of their own.
var tls = &rest.Config{TLSClientConfig: rest.TLSClientConfig{Insecure: true}}

// exec runs true in a container as kubectl does, from the request to the exit code.
func (c *client) exec(ctx context.Context, p pod, name string, executor func(*url.URL) (remotecommand.Executor, error)) {
	c.timed(name, func() error {
		answer, err := c.Exec(ctx, &cri.ExecRequest{ContainerId: p.container, Cmd: []string{"true"}, Stdout: true, Stderr: true})
		if err != nil {
			return err
		}
		address, err := url.Parse(answer.GetUrl())
		if err != nil {
			return err
		}
		made, err := executor(address)
		if err != nil {
			return err
		}
		return made.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: io.Discard, Stderr: io.Discard})
	})
}

func (c *client) execs(ctx context.Context, p pod) {
	c.exec(ctx, p, "Exec true over SPDY", func(address *url.URL) (remotecommand.Executor, error) {
		return remotecommand.NewSPDYExecutor(tls, "POST", address)
	})
	c.exec(ctx, p, "Exec true over WebSocket", func(address *url.URL) (remotecommand.Executor, error) {
		return remotecommand.NewWebSocketExecutorForProtocols(tls, "GET", address.String(), "v5.channel.k8s.io", "v4.channel.k8s.io")
	})
}

// throughput forwards a port of a pod that echoes, and returns how many MiB per second went each way.
func (c *client) throughput(ctx context.Context) float64 {
	p := c.upWith(ctx, "forward", []string{"nc", "-ll", "-p", "9000", "-e", "cat"})
	defer c.down(ctx, p)
	answer, err := c.PortForward(ctx, &cri.PortForwardRequest{PodSandboxId: p.sandbox, Port: []int32{9000}})
	if err != nil {
		log.Fatalf("PortForward: %v", err)
	}
	address, err := url.Parse(answer.GetUrl())
	if err != nil {
		log.Fatalf("PortForward: %v", err)
	}
	transport, upgrader, err := spdy.RoundTripperFor(tls)
	if err != nil {
		log.Fatal(err)
	}
	connection, _, err := spdy.NewDialer(upgrader, &http.Client{Transport: transport}, "POST", address).Dial(portforward.PortForwardProtocolV1Name)
	if err != nil {
		log.Fatalf("port-forward: %v", err)
	}
	defer connection.Close()
	for request := 0; ; request++ {
		took, err := echo(connection, request)
		if err == nil {
			return forwarded / took.Seconds() / (1 << 20)
		}
		// The program in the pod may not listen yet.
		if request == 100 {
			log.Fatalf("port-forward: %v", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// echo sends bytes through one forwarded connection and reads them back, and returns how long that took.
func echo(connection httpstream.Connection, request int) (time.Duration, error) {
	open := func(kind string) (httpstream.Stream, error) {
		return connection.CreateStream(http.Header{
			v1.StreamType:                 []string{kind},
			v1.PortHeader:                 []string{"9000"},
			v1.PortForwardRequestIDHeader: []string{fmt.Sprint(request)},
		})
	}
	failed, err := open(v1.StreamTypeError)
	if err != nil {
		return 0, err
	}
	failed.Close()
	data, err := open(v1.StreamTypeData)
	if err != nil {
		return 0, err
	}
	defer connection.RemoveStreams(failed, data)
	start := time.Now()
	go func() {
		chunk := make([]byte, 32<<10)
		for range forwarded / len(chunk) {
			if _, err := data.Write(chunk); err != nil {
				return
			}
		}
	}()
	if _, err := io.CopyN(io.Discard, data, forwarded); err != nil {
		message, _ := io.ReadAll(failed)
		return 0, fmt.Errorf("%w %s", err, message)
	}
	took := time.Since(start)
	return took, data.Reset()
}
