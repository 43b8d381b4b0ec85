/**
 * virtio-ipsec: a userspace virtio-net driver with the inline IPsec of Virtio 1.4 and the same in software.
 *
 * Start with `openNic`. Packets are numbers into `nic.packets`; SAs come from `nic.ipsec.addSa`.
 */
export {
  AdminCommandError,
  InputError,
  IpsecError,
  SystemError,
  VfioError,
  VipsecError,
  VirtioError,
} from './errors.ts';
export type { EngineName } from './fallback/engines/engine.ts';
export {
  type EsnState,
  InlineCrypto,
  type InlineCryptoCounters,
  type InlineCryptoOptions,
  type InlineCryptoParameters,
} from './fallback/inline-crypto.ts';
export { writeTooBig } from './fallback/pmtu.ts';
export { type SaCounters, type SaEvent, SoftwareIpsec, type SoftwareIpsecOptions } from './fallback/software.ts';
export { VERDICTS, Verdict, verdictNames } from './fallback/verdict.ts';
export { algorithmNames, type InlineCapability, modeName, optionNamesOf } from './ipsec/capability.ts';
export { type Description, describeSa } from './ipsec/describe.ts';
export type {
  AddSaOptions,
  Ipsec,
  KeyReservation,
  RedactedSaObject,
  SaEvents,
  SaHandle,
  SaNotification,
  SaTraffic,
} from './ipsec/ipsec.ts';
export type { MoveOptions } from './ipsec/move.ts';
export type { Placement, Where } from './ipsec/placement.ts';
export { OutboundPolicy } from './ipsec/policy.ts';
export {
  type PreparedPair,
  type RekeyOptions,
  type Retirement,
  SaPair,
  type SaPairInput,
  type SaPairOptions,
} from './ipsec/rekey.ts';
// SAs and policies without a NIC.
export type {
  Aead,
  Auth,
  Cipher,
  Direction,
  Lifetime,
  Mode,
  Prefix,
  Protocol,
  SaOptions,
  SecurityAssociation,
  Selector,
  Tunnel,
} from './ipsec/sa.ts';
export { loadSaFile, parseSaDocument, type SaFile } from './ipsec/sa-file.ts';
export { SecretBytes } from './ipsec/secret.ts';
export { type SecurityAssociationInput, validateSa, validateSas } from './ipsec/validate.ts';
// ESP actions in the shape of the RDMA verbs.
export type {
  EncapIpv4Ext,
  EncapIpv6,
  EspAttr,
  EspEncap,
  EspKeymatAesGcm,
  FlowActionEspAttributes,
  FlowActionEspModify,
} from './ipsec/verbs/attributes.ts';
export { createFlowActionEsp, type FlowActionEsp, type VerbsNic } from './ipsec/verbs/flow-action.ts';
export {
  type Flow,
  type FlowOptions,
  type FlowSpec,
  FlowTable,
  type IpSpec,
  type PortSpec,
} from './ipsec/verbs/flow-table.ts';
export {
  EspFlag,
  EspKeymat,
  EspMask,
  EspReplay,
  FlowSpecType,
  Ipv4SpecFlag,
  IvAlgorithm,
} from './ipsec/verbs/numbers.ts';
export type { Announcer } from './nic/announce.ts';
export { isPortAddress, openFunction, openPort } from './nic/device.ts';
export type { WaitPolicy } from './nic/interrupts.ts';
export { type Nic, type NicLink, openNic } from './nic/nic.ts';
export type { NicOffloads } from './nic/offloads.ts';
export type { IpsecMode, NicOptions } from './nic/options.ts';
export type { NicRxQueue } from './nic/rx-queue.ts';
export type { NicQueue, NicStatistics } from './nic/statistics.ts';
export type { NicTxQueue } from './nic/tx-queue.ts';
// Packets and captures.
export {
  formatIp,
  formatMac,
  formatPrefix,
  type ParsedPrefix,
  parseIp,
  parseMac,
  parsePrefix,
} from './packet/addresses.ts';
export { type CaptureDecoder, CaptureRecord, MAX_PACKET_LENGTH } from './packet/capture.ts';
export { CaptureReader, CaptureWriter, type CaptureWriterOptions } from './packet/capture-file.ts';
export {
  Ah,
  Esp,
  Ethernet,
  EtherType,
  IpProtocol,
  Ipv4,
  Ipv6,
  LinkType,
  Tcp,
  Udp,
  Vlan,
} from './packet/fields.ts';
export { NO_PACKET, PacketFlag, PacketPool, type PacketPoolOptions } from './packet/pool.ts';
export type { PacketArena } from './packet/references.ts';
export type { OctepReport } from './probe/octep.ts';
export { type PortReport, probePort } from './probe/port.ts';
// The functions of this host, and what a device says about itself.
export {
  type ModeReport,
  type PciReport,
  type ProbeOptions,
  type ProbeReport,
  type Problem,
  probeFunction,
} from './probe/probe.ts';
export { type MappedMemory, mapAnonymous, unmapMemory } from './sys/memory.ts';
export { createMemoryFile } from './sys/memory-file.ts';
export { type BindOptions, type BindResult, bindFunction, unbindFunction } from './vfio/bind.ts';
export type { DeviceFunction, PciFunction } from './vfio/function.ts';
export { listFunctions, type PciDescription } from './vfio/sysfs.ts';
export { Feature, type FeatureBit, FeatureSet, featureName } from './virtio/features.ts';
export { WIRE_REVISIONS, type WireRevision } from './virtio/revision.ts';
export { type Coalescing, type HashConfig, HashType, type RssConfig } from './virtio-net/control-wire.ts';
export type { DeviceStatistics } from './virtio-net/device-statistics.ts';
export {
  type FlowAction,
  FlowFilter,
  type FlowGroupHandle,
  type FlowRuleHandle,
  type FlowRuleOptions,
} from './virtio-net/flow-filter.ts';
export type {
  AddressMatch,
  EspMatch,
  EthernetMatch,
  FlowMatch,
  IpMatch,
  NumberMatch,
  PortMatch,
  TcpMatch,
} from './virtio-net/flow-match.ts';
export { GsoType, HashReport } from './virtio-net/header.ts';
export type { NetControl, ReceiveMode } from './virtio-net/net-control.ts';
export { RxCounter } from './virtio-net/rx.ts';
export { TxCounter } from './virtio-net/tx.ts';
// Queue pairs in worker threads.
export type { ArenaHandle } from './worker/arena-loans.ts';
export type { QueueHandle } from './worker/handle.ts';
export { openQueue } from './worker/open-queue.ts';
export type { WorkerNicQueue } from './worker/worker-nic-queue.ts';
export type { QueueEnd, WorkerQueue, WorkerQueueState } from './worker/worker-queue.ts';
