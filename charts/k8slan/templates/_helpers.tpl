{{- define "k8slan.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "k8slan.labels" -}}
app.kubernetes.io/name: k8slan
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* The labels by which a workload selects its pods. The argument is the component's name. */ -}}
{{- define "k8slan.selector" -}}
app.kubernetes.io/name: k8slan
app.kubernetes.io/component: {{ . }}
{{- end }}

{{- /* "true" if nodes speak BGP, or else empty. */ -}}
{{- define "k8slan.evpn" -}}
{{- if or .Values.evpn.enabled (eq .Values.discovery "evpn") }}true{{ end }}
{{- end }}

{{- /* "true" if reflectors run, or else empty. */ -}}
{{- define "k8slan.reflectors" -}}
{{- if and (include "k8slan.evpn" .) .Values.evpn.reflectors.replicas }}true{{ end }}
{{- end }}

{{- /* A router in the form of the daemon's flag. The arguments are an item of evpn.peers and its index. */ -}}
{{- define "k8slan.peer" -}}
{{- $p := index . 0 -}}
address={{ $p.address }}
{{- with $p.port }},port={{ int64 . }}{{ end }}
{{- with $p.as }},as={{ int64 . }}{{ end }}
{{- with $p.holdTime }},hold-time={{ . }}{{ end }}
{{- with $p.multihop }},multihop={{ int64 . }}{{ end }}
{{- if $p.passwordSecret }},password-file=/etc/k8slan/bgp/peer-{{ index . 1 }}/password{{ end }}
{{- if $p.ipv6VTEPs }},ipv6-vteps{{ end }}
{{- end }}

{{- /* The Secrets with the passwords of a daemon's BGP sessions, as JSON. */ -}}
{{- define "k8slan.passwords" -}}
{{- $all := list }}
{{- if include "k8slan.evpn" . }}
{{- if and (include "k8slan.reflectors" .) .Values.evpn.reflectors.passwordSecret }}
{{- $all = append $all (dict "name" "reflectors" "secret" .Values.evpn.reflectors.passwordSecret) }}
{{- end }}
{{- range $i, $peer := .Values.evpn.peers }}
{{- with $peer.passwordSecret }}{{ $all = append $all (dict "name" (printf "peer-%d" $i) "secret" .) }}{{ end }}
{{- end }}
{{- end }}
{{- toJson $all }}
{{- end }}

{{- /* Devices as a part of a sentence. The argument is a list in which "" is the device that a node chooses. */ -}}
{{- define "k8slan.devices" -}}
{{- $names := list }}
{{- range . }}{{ $names = append $names (. | default "the device that a node chooses") }}{{ end }}
{{- join ", " $names }}
{{- end }}

{{- /* Annotations of a hook. The arguments are the event, the weight, and optionally the policy of deletion. */ -}}
{{- define "k8slan.hook" -}}
helm.sh/hook: {{ index . 0 }}
helm.sh/hook-weight: {{ index . 1 | quote }}
helm.sh/hook-delete-policy: {{ if gt (len .) 2 }}{{ index . 2 }}{{ else }}before-hook-creation,hook-succeeded{{ end }}
{{- end }}

{{- /* A container of a hook. The arguments are the root, the container's name and its arguments. */ -}}
{{- define "k8slan.hookContainer" -}}
{{- $root := index . 0 -}}
name: {{ index . 1 }}
image: {{ include "k8slan.image" $root }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
args: {{ toJson (index . 2) }}
env:
  - name: POD_NAMESPACE
    valueFrom:
      fieldRef:
        fieldPath: metadata.namespace
{{ include "k8slan.unprivileged" $root }}
{{- end }}

{{- define "k8slan.unprivileged" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  capabilities:
    drop: [ALL]
  seccompProfile:
    type: RuntimeDefault
resources:
  requests:
    cpu: 10m
    memory: 16Mi
  limits:
    memory: 256Mi
{{- end }}

{{- /* The nodes on which the controller, the reflectors and the hooks may run. */ -}}
{{- define "k8slan.placement" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
priorityClassName: {{ .Values.controller.priorityClassName | quote }}
nodeSelector:
  {{- toYaml .Values.controller.nodeSelector | nindent 2 }}
tolerations:
  {{- toYaml .Values.controller.tolerations | nindent 2 }}
{{- end }}
