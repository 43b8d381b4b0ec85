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
export { type SaCounters, type SaEvent, SoftwareIpsec, type SoftwareIpsecOptions } from './fallback/software.ts';
export { VERDICTS, Verdict, verdictNames } from './fallback/verdict.ts';
export { algorithmNames, type InlineCapability, modeName, optionNamesOf } from './ipsec/capability.ts';
export type {
  AddSaOptions,
  Ipsec,
  RedactedSaObject,
  SaEvents,
  SaHandle,
  SaTraffic,
} from './ipsec/ipsec.ts';
export type { Placement, Where } from './ipsec/placement.ts';
export type { SecurityAssociation } from './ipsec/sa.ts';
export { loadSaFile, parseSaDocument, type SaFile } from './ipsec/sa-file.ts';
export { type SecurityAssociationInput, validateSa, validateSas } from './ipsec/validate.ts';
export { type Nic, type NicLink, type NicQueue, type NicStatistics, openNic } from './nic.ts';
export { type IpsecMode, type NicOptions, openFunction } from './nic-options.ts';
export type { NicRxQueue, NicTxQueue } from './nic-queues.ts';
export { NO_PACKET, PacketFlag, PacketPool, type PacketPoolOptions } from './packet/pool.ts';
export type { PciFunction } from './vfio/function.ts';
export { Feature, FeatureSet, featureName } from './virtio/features.ts';
export { WIRE_REVISIONS, type WireRevision } from './virtio/revision.ts';
export {
  type FlowAction,
  FlowFilter,
  type FlowGroupHandle,
  type FlowRuleHandle,
  type FlowRuleOptions,
} from './virtio-net/flow-filter.ts';
export type { FlowMatch } from './virtio-net/flow-match.ts';
export { RxCounter } from './virtio-net/rx.ts';
export { TxCounter } from './virtio-net/tx.ts';
