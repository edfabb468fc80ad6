// The tables of the bodies behind kernels.h. Included by kernels_<level>.cpp once it has set the
// target; simd.h says why everything is in an anonymous namespace.

#include "cpu/layers_impl.h"
#include "cpu/lists_impl.h"
#include "cpu/merge_impl.h"
#include "cpu/products_impl.h"

namespace mima {
namespace {

template <class T>
constexpr BlockKernels<T> kBlock = {gemm_nt<T>,
                                    gemm_nn<T>,
                                    gemm_panels<T>,
                                    pack_panel<T>,
                                    sum_runs<T>,
                                    softmax_rows<T>,
                                    softmax_backward_rows<T>,
                                    softmax_double_backward_rows<T>,
                                    kPanelVecs * kLanes<T>};

template <class T>
constexpr StorageKernels kStorage = {load_rows<T>,
                                     load_difference_rows<T>,
                                     store_rows<T, false>,
                                     store_rows<T, true>,
                                     add_rows<T>,
                                     merge<T>,
                                     merge_backward<T>,
                                     combine<T>,
                                     adam<T>,
                                     adam_backward<T>,
                                     norm<T>,
                                     norm_backward<T>,
                                     norm_double_backward<T>,
                                     geglu<T>,
                                     geglu_backward<T>,
                                     geglu_double_backward<T>};

}  // namespace

extern const Kernels MIMA_KERNELS = {
    MIMA_VECTOR_BYTES,
    kBlock<float>,
    kBlock<double>,
    {kStorage<float>, kStorage<double>, kStorage<BFloat16>, kStorage<Float16>}};

}  // namespace mima
