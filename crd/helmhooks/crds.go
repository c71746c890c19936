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

// ApplyCRDs brings the CustomResourceDefinitions in files, one in each, to the state that they have there. One that is not
// in the cluster is passed over: to make it is the installation's.
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
		definition := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(content, &definition.Object); err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		there := definition.DeepCopy()
		err = r.Client.Get(ctx, client.ObjectKeyFromObject(there), there)
		if apierrors.IsNotFound(err) {
			r.Log.Info("CRD is not there yet", "crd", definition.GetName())
			continue
		}
		if err != nil {
			return fmt.Errorf("get CRD %s: %w", definition.GetName(), err)
		}
		err = r.Client.Apply(ctx, client.ApplyConfigurationFromUnstructured(definition), client.FieldOwner("k8slan"), client.ForceOwnership)
		if err != nil {
			return fmt.Errorf("apply CRD %s: %w", definition.GetName(), err)
		}
		r.Log.Info("CRD is up to date", "crd", definition.GetName())
	}
	return nil
}
