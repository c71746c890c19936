package helmhooks

import (
	"context"
	"fmt"
	"io/fs"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"
)

// ApplyCRDs applies the CustomResourceDefinitions in files, one in each file. It skips those that are not in the
// cluster, because Helm creates them on installation.
func (r Release) ApplyCRDs(ctx context.Context, files fs.FS) error {
	names, err := fs.Glob(files, "*.yaml")
	if err != nil {
		return err
	}
	for _, name := range names {
		content, err := fs.ReadFile(files, name)
		if err != nil {
			return err
		}
		want := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(content, &want.Object); err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		have := want.DeepCopy()
		err = r.Client.Get(ctx, client.ObjectKeyFromObject(have), have)
		if apierrors.IsNotFound(err) {
			r.Log.Info("CRD does not exist", "crd", want.GetName())
			continue
		}
		if err != nil {
			return fmt.Errorf("get CRD %s: %w", want.GetName(), err)
		}
		err = r.Client.Apply(ctx, client.ApplyConfigurationFromUnstructured(want),
			client.FieldOwner("k8slan"), client.ForceOwnership)
		if err != nil {
			return fmt.Errorf("apply CRD %s: %w", want.GetName(), err)
		}
		r.Log.Info("CRD is up to date", "crd", want.GetName())
	}
	return nil
}
